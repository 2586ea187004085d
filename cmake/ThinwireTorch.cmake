# thinwire_torch: the torch that Python3_EXECUTABLE imports, as an interface target. Not find_package(Torch): that one enables CUDA, demands a toolkit of torch's own
# version and rewrites global flags.
set(THINWIRE_TORCH_MISSING "")
find_package(Python3 QUIET COMPONENTS Interpreter Development.Module)
if(NOT Python3_Interpreter_FOUND OR NOT Python3_Development.Module_FOUND)
  set(THINWIRE_TORCH_MISSING "no Python 3 with headers was found")
  return()
endif()

# One process per interpreter and configuration: importing torch takes seconds.
if(NOT THINWIRE_TORCH_PYTHON STREQUAL Python3_EXECUTABLE)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
            "import torch, torch.utils.cpp_extension as c; print(torch.__version__, '|'.join(c.include_paths()), '|'.join(c.library_paths()), sep='\\n')"
    OUTPUT_VARIABLE answer ERROR_VARIABLE complaint RESULT_VARIABLE status OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    string(REGEX REPLACE ".*\n([^\n]+)\n*$" "\\1" complaint "${complaint}")
    set(THINWIRE_TORCH_MISSING "${Python3_EXECUTABLE}: ${complaint}")
    return()
  endif()
  string(REPLACE "\n" ";" answer "${answer}")
  list(GET answer -3 version)
  list(GET answer -2 includes)
  list(GET answer -1 libraries)
  string(REPLACE "|" ";" includes "${includes}")
  string(REPLACE "|" ";" libraries "${libraries}")
  set(THINWIRE_TORCH_VERSION "${version}" CACHE INTERNAL "")
  set(THINWIRE_TORCH_INCLUDES "${includes}" CACHE INTERNAL "")
  set(THINWIRE_TORCH_LIBRARIES "${libraries}" CACHE INTERNAL "")
  set(THINWIRE_TORCH_PYTHON "${Python3_EXECUTABLE}" CACHE INTERNAL "")
endif()
list(GET THINWIRE_TORCH_INCLUDES 0 site)  # …/site-packages/torch/include
cmake_path(GET site PARENT_PATH site)
cmake_path(GET site PARENT_PATH THINWIRE_TORCH_SITE)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" THINWIRE_TORCH_MINOR "${THINWIRE_TORCH_VERSION}")

add_library(thinwire_torch INTERFACE)
target_include_directories(thinwire_torch SYSTEM INTERFACE ${THINWIRE_TORCH_INCLUDES})
target_link_directories(thinwire_torch INTERFACE ${THINWIRE_TORCH_LIBRARIES})
target_link_libraries(thinwire_torch INTERFACE torch torch_cpu c10)
target_compile_definitions(thinwire_torch INTERFACE USE_DISTRIBUTED USE_C10D_GLOO)  # what torch itself was built with; its headers hide c10d without them
set(THINWIRE_TORCH_FOUND TRUE)
