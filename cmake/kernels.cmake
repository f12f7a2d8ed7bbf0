# csat_kernels: the CUDA kernels as a static library without torch, its package, and a consumer of the installed package.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Machine code of both, and PTX of sm_80 for later GPUs, as in setup.py, which compiles less of what Hopper does not need.
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
endif()
enable_language(CUDA)
list(APPEND CMAKE_MODULE_PATH ${PROJECT_SOURCE_DIR}/cmake)
find_package(CUDAToolkit REQUIRED)
find_package(CsatCublas REQUIRED)

add_library(csat_kernels STATIC ${CSAT_KERNEL_SOURCES})
add_library(csat_ext::csat_kernels ALIAS csat_kernels)
# Flags, not a property: CMake before 3.26 does not know that nvcc has C++20. limits.h is constexpr for host and device.
target_compile_options(csat_kernels PRIVATE -std=c++20 $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
string(REPLACE ";" "." archs "${CMAKE_CUDA_ARCHITECTURES}")  # device.cu asks it for 90a
target_compile_definitions(csat_kernels PRIVATE CSAT_CUDA_ARCHS=${archs})
target_include_directories(csat_kernels PUBLIC $<BUILD_INTERFACE:${CSAT_SOURCE_ROOT}> $<INSTALL_INTERFACE:include>)
target_link_libraries(csat_kernels PRIVATE CUDA::cudart_static csat_ext::cublas)
set_target_properties(csat_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)
csat_unity(csat_kernels)  # of CUDA files CMake does that from 3.31 on

# ---- install and package
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/csat_ext)
install(TARGETS csat_kernels EXPORT csat_ext)
install(FILES ${CSAT_SOURCE_ROOT}/csat/launch.h ${CSAT_SOURCE_ROOT}/csat/limits.h ${CSAT_SOURCE_ROOT}/csat/ensembles.h
              ${CSAT_SOURCE_ROOT}/csat/window.h
        DESTINATION include/csat)
install(EXPORT csat_ext NAMESPACE csat_ext:: FILE csat_extTargets.cmake DESTINATION ${package_dir})
configure_package_config_file(cmake/csat_extConfig.cmake.in csat_extConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(csat_extConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/csat_extConfig.cmake ${PROJECT_BINARY_DIR}/csat_extConfigVersion.cmake
              cmake/FindCsatCublas.cmake DESTINATION ${package_dir})

# ---- a project of its own that finds the installed package, links it and runs (host code only: no GPU is needed)
set(stage ${PROJECT_BINARY_DIR}/consumer_stage)
add_test(NAME install COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${stage})
set_tests_properties(install PROPERTIES FIXTURES_SETUP installed)
add_test(NAME consumer
         COMMAND ${CMAKE_CTEST_COMMAND} --build-and-test ${PROJECT_SOURCE_DIR}/cmake/consumer ${PROJECT_BINARY_DIR}/consumer
                 --build-generator ${CMAKE_GENERATOR}
                 --build-options -DCMAKE_PREFIX_PATH=${stage} -DCSAT_CUBLAS_ROOT=${CSAT_CUBLAS_ROOT}
                                 -DCUDAToolkit_ROOT=${CUDAToolkit_BIN_DIR}/..
                 --test-command consumer)
set_tests_properties(consumer PROPERTIES FIXTURES_REQUIRED installed)
