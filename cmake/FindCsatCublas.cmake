# Finds cuBLAS for csat_kernels and defines csat_ext::cublas. Looks in CSAT_CUBLAS_ROOT (a prefix with include/ and lib/, such as
# site-packages/nvidia/cu13 of a CUDA build of torch), then in the CUDA toolkit. Installed with the package: its users need
# the same library.
find_path(CSAT_CUBLAS_INCLUDE cublas_v2.h HINTS ${CSAT_CUBLAS_ROOT}/include ${CUDAToolkit_INCLUDE_DIRS})
find_library(CSAT_CUBLAS_LIBRARY NAMES cublas libcublas.so.${CUDAToolkit_VERSION_MAJOR}
             HINTS ${CSAT_CUBLAS_ROOT}/lib ${CSAT_CUBLAS_ROOT}/lib64 ${CUDAToolkit_LIBRARY_DIR})
find_library(CSAT_CUBLASLT_LIBRARY NAMES cublasLt libcublasLt.so.${CUDAToolkit_VERSION_MAJOR}
             HINTS ${CSAT_CUBLAS_ROOT}/lib ${CSAT_CUBLAS_ROOT}/lib64 ${CUDAToolkit_LIBRARY_DIR})
mark_as_advanced(CSAT_CUBLAS_INCLUDE CSAT_CUBLAS_LIBRARY CSAT_CUBLASLT_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  CsatCublas
  REQUIRED_VARS CSAT_CUBLAS_LIBRARY CSAT_CUBLASLT_LIBRARY CSAT_CUBLAS_INCLUDE
  REASON_FAILURE_MESSAGE "set CSAT_CUBLAS_ROOT to a directory with include/cublas_v2.h and lib/libcublas")

if(CsatCublas_FOUND AND NOT TARGET csat_ext::cublas)
  add_library(csat_ext::cublas INTERFACE IMPORTED)
  target_link_libraries(csat_ext::cublas INTERFACE ${CSAT_CUBLAS_LIBRARY} ${CSAT_CUBLASLT_LIBRARY})
  target_include_directories(csat_ext::cublas INTERFACE ${CSAT_CUBLAS_INCLUDE})
endif()
