# nvcc, if there is one: CMAKE_CUDA_COMPILER, CUDACXX, PATH, or CUDA_HOME. Compiling needs no GPU. Machine code for the architectures of THINWIRE_CUDA_ARCHITECTURES;
# the newest one's PTX too, for GPUs to come.
set(THINWIRE_CUDA_MISSING "")
set(THINWIRE_CUDA_ARCHITECTURES "80-real;90" CACHE STRING "GPU architectures, in the words of CMAKE_CUDA_ARCHITECTURES")

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(THINWIRE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  mark_as_advanced(THINWIRE_NVCC)
  if(NOT THINWIRE_NVCC)
    set(THINWIRE_CUDA_MISSING "No nvcc is on PATH, in CUDA_HOME or in /usr/local/cuda")
    return()
  endif()
  set(CMAKE_CUDA_COMPILER ${THINWIRE_NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES ${THINWIRE_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # the runtime that torch brought, when torch is there
enable_language(CUDA)
find_package(CUDAToolkit QUIET)
if(NOT TARGET CUDA::cudart)
  set(THINWIRE_CUDA_MISSING "${CMAKE_CUDA_COMPILER} has no shared runtime (libcudart.so) beside it")
  return()
endif()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  set(THINWIRE_CUDA_MISSING "${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}")
  return()
endif()
set(THINWIRE_CUDA_FOUND TRUE)

# CMake 3.25 knows no C++20 of nvcc 13. No fused multiply-add: bits are the CPU's. 554: the conversion of ConstBytes to itself, which its constraint rules out.
target_compile_options(thinwire_flags INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;--fmad=false;--expt-relaxed-constexpr;--diag-suppress=554;-Xcompiler=-Wall>")
