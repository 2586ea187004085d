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

list(TRANSFORM THINWIRE_PIECES REPLACE "(.+)" "PATTERN;\\1;EXCLUDE" OUTPUT_VARIABLE pieces)
install(DIRECTORY compressors collectives DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/thinwire FILES_MATCHING PATTERN "*.hpp" ${pieces})
install(DIRECTORY ${PROJECT_BINARY_DIR}/include/thinwire DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT thinwire-targets NAMESPACE thinwire:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/thinwire)
install(FILES ${PROJECT_BINARY_DIR}/thinwireConfig.cmake ${PROJECT_BINARY_DIR}/thinwireConfigVersion.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/thinwire)
