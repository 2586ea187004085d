# The installed package: headers under include/thinwire/, the umbrella <thinwire/thinwire.hpp>, and find_package(thinwire).
include(CMakePackageConfigHelpers)

if(THINWIRE_WITH_MPI)
  set(THINWIRE_MPI_VERSION ${MPI_CXX_VERSION})
  set(THINWIRE_MPI_INCLUDE "#include \"collectives/mpi/mpi.hpp\"\n")
endif()
if(THINWIRE_WITH_CUDA)
  set(THINWIRE_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
endif()
configure_file(${PROJECT_SOURCE_DIR}/cmake/build.hpp.in ${PROJECT_BINARY_DIR}/include/thinwire/build.hpp @ONLY)
configure_file(${PROJECT_SOURCE_DIR}/cmake/thinwire.hpp.in ${PROJECT_BINARY_DIR}/include/thinwire/thinwire.hpp @ONLY)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/thinwireConfig.cmake.in ${PROJECT_BINARY_DIR}/thinwireConfig.cmake
                              INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/thinwire)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/thinwireConfigVersion.cmake COMPATIBILITY SameMinorVersion)

# What a program may include: the reducer, transports, a codec by its name, and what these are declared with. All other headers are our own.
set(public
  collectives/communicator.hpp collectives/reducer.hpp collectives/watchdog_state.hpp
  compressors/core/codec.hpp compressors/core/config.hpp compressors/core/dtype.hpp compressors/core/error.hpp compressors/core/isa.hpp compressors/core/plan.hpp
  compressors/core/policy.hpp compressors/core/recursion.hpp compressors/core/registry.hpp compressors/core/span.hpp compressors/core/state_array.hpp
  compressors/core/stream.hpp compressors/core/wire.hpp)
if(THINWIRE_WITH_MPI)
  list(APPEND public collectives/mpi/mpi.hpp)
endif()
if(THINWIRE_WITH_NCCL)
  list(APPEND public collectives/nccl/nccl.hpp)
endif()
foreach(header ${public})
  cmake_path(GET header PARENT_PATH folder)
  install(FILES ${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/thinwire/${folder})
endforeach()
install(DIRECTORY ${PROJECT_BINARY_DIR}/include/thinwire DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT thinwire-targets NAMESPACE thinwire:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/thinwire)
install(FILES ${PROJECT_BINARY_DIR}/thinwireConfig.cmake ${PROJECT_BINARY_DIR}/thinwireConfigVersion.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/thinwire)
