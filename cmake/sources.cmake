# The kernels' sources, read by both builds of them.
set(CSAT_SOURCE_ROOT ${PROJECT_SOURCE_DIR}/csrc CACHE PATH "Where the kernels lie; the mutation test names copies with a fault")
file(GLOB CSAT_KERNEL_SOURCES CONFIGURE_DEPENDS ${CSAT_SOURCE_ROOT}/kernels/*.cu ${CSAT_SOURCE_ROOT}/kernels/*.cpp)
# The one file that calls a library; the emulator has a kernel in its place.
set(CSAT_CUBLAS_SOURCES ${CSAT_SOURCE_ROOT}/kernels/gemm_cublas.cu)
