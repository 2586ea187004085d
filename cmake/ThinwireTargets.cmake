# How libraries and programs are declared here.

# Headers that are a piece of the files that include them (the body that SIMD twins share): neither installed nor compiled alone.
set(THINWIRE_PIECES compressors/core/vector_avx2.hpp compressors/core/vector_avx512.hpp compressors/sign/sign_vector.hpp compressors/topk/topk_vector.hpp)

# thinwire_library(<name> SOURCES … [LINK …]): the target thinwire::<name>, position independent, symbols hidden, installed and exported.
function(thinwire_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_library(thinwire_${name} ${ARG_SOURCES})
  add_library(thinwire::${name} ALIAS thinwire_${name})
  set_target_properties(thinwire_${name} PROPERTIES EXPORT_NAME ${name} POSITION_INDEPENDENT_CODE ON)
  if(NOT BUILD_SHARED_LIBS)  # a shared build exports everything: the headers carry no export macros
    set_target_properties(thinwire_${name} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  endif()
  target_compile_features(thinwire_${name} PUBLIC cxx_std_20)
  target_include_directories(
    thinwire_${name} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}> $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include>
                            $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/thinwire>)
  target_link_libraries(thinwire_${name} PUBLIC ${ARG_LINK} PRIVATE $<BUILD_INTERFACE:thinwire_flags>)
  install(TARGETS thinwire_${name} EXPORT thinwire-targets)
endfunction()

# thinwire_shared_objects(<name> SOURCES …): the object library thinwire_<name>_objects, of files that a library and its emulated twin have in common; each takes it
# as $<TARGET_OBJECTS:…>.
function(thinwire_shared_objects name)
  cmake_parse_arguments(ARG "" "" "SOURCES" ${ARGN})
  add_library(thinwire_${name}_objects OBJECT EXCLUDE_FROM_ALL ${ARG_SOURCES})
  set_target_properties(thinwire_${name}_objects PROPERTIES POSITION_INDEPENDENT_CODE ON)
  if(NOT BUILD_SHARED_LIBS)
    set_target_properties(thinwire_${name}_objects PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  endif()
  target_include_directories(thinwire_${name}_objects PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR}/include)
  target_link_libraries(thinwire_${name}_objects PRIVATE thinwire_flags)
endfunction()

# thinwire_emulated_library(<name> SOURCES … [LINK …]): thinwire::emulated_<name>, for tests: kernels are compiled as C++ and run by tests/cuda_emulator.
function(thinwire_emulated_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  set(kernels ${ARG_SOURCES})
  list(FILTER kernels INCLUDE REGEX "\\.cu$")
  list(FILTER ARG_SOURCES EXCLUDE REGEX "\\.cu$")
  foreach(kernel ${kernels})  # a file of its own: its language is CUDA wherever it is named by itself
    set(twin ${CMAKE_CURRENT_BINARY_DIR}/emulated/${kernel}.cpp)
    file(CONFIGURE OUTPUT ${twin} CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${kernel}\"\n")
    list(APPEND ARG_SOURCES ${twin})
  endforeach()
  add_library(thinwire_emulated_${name} STATIC EXCLUDE_FROM_ALL ${ARG_SOURCES})
  add_library(thinwire::emulated_${name} ALIAS thinwire_emulated_${name})
  set_target_properties(thinwire_emulated_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_include_directories(thinwire_emulated_${name} BEFORE PUBLIC ${PROJECT_SOURCE_DIR}/tests/cuda_emulator ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR}/include)
  target_compile_options(thinwire_emulated_${name} PRIVATE -Wno-unknown-pragmas)
  target_link_libraries(thinwire_emulated_${name} PUBLIC ${ARG_LINK} PRIVATE thinwire_flags)
endfunction()

# thinwire_program(<name> SOURCES … LINK …): a program of the build tree.
function(thinwire_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LINK} thinwire_flags)
endfunction()
