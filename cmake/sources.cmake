# The kernels' sources, read by both builds of them.
set(CSAT_SOURCE_ROOT ${PROJECT_SOURCE_DIR}/csrc CACHE PATH "Where the kernels lie; the mutation test names copies with a fault")
file(GLOB CSAT_HOST_SOURCES CONFIGURE_DEPENDS ${CSAT_SOURCE_ROOT}/kernels/*.cu ${CSAT_SOURCE_ROOT}/kernels/*.cpp)
file(GLOB CSAT_INSTANCE_SOURCES CONFIGURE_DEPENDS ${CSAT_SOURCE_ROOT}/kernels/instances/*.cu)
# Largest first (forward_*): compilers that work side by side then end together.
list(REVERSE CSAT_INSTANCE_SOURCES)
set(CSAT_KERNEL_SOURCES ${CSAT_INSTANCE_SOURCES} ${CSAT_HOST_SOURCES})
# The one file that calls a library; the emulator has a kernel in its place.
set(CSAT_CUBLAS_SOURCES ${CSAT_SOURCE_ROOT}/kernels/gemm_cublas.cu)

# Half of what a file of instances costs without optimisation is reading the headers. Files written by hand stay single: what
# they name in anonymous namespaces may collide.
option(CSAT_UNITY "Compile the files that instantiate kernels several at a time: less work, coarser rebuilds" OFF)
function(csat_unity target)
  set_source_files_properties(${CSAT_HOST_SOURCES} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${CSAT_UNITY} UNITY_BUILD_BATCH_SIZE 3)
endfunction()
