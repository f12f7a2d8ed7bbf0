# csat_emulated (the kernels on the CPU, for tests/emulator/backend.py) and the emulator's self tests.
set(emulator_dir ${PROJECT_SOURCE_DIR}/tests/emulator)

# Code that runs as fibers is compiled with the hooks of the thread sanitizer, but linked without its runtime: the emulator's
# runtime/access.cpp defines the hooks. One access of the source must stay one access, so nothing may merge them.
add_library(emulated_code INTERFACE)
target_compile_definitions(emulated_code INTERFACE CSAT_EMULATE)
target_include_directories(emulated_code INTERFACE ${CSAT_SOURCE_ROOT} ${emulator_dir})
target_compile_options(emulated_code INTERFACE -O2 -march=native -fsanitize=thread -fno-tree-vectorize -fno-tree-slp-vectorize
                       -fno-store-merging --param=tsan-instrument-func-entry-exit=0 -Wall -Wextra -Wno-unknown-pragmas)

file(GLOB runtime_sources CONFIGURE_DEPENDS ${emulator_dir}/runtime/*.cpp)
add_library(emulator_runtime STATIC ${runtime_sources})
target_include_directories(emulator_runtime PUBLIC ${emulator_dir})
target_compile_options(emulator_runtime PRIVATE -O2 -march=native -Wall -Wextra)
target_link_libraries(emulator_runtime PUBLIC ${CMAKE_DL_LIBS})
set_target_properties(emulator_runtime PROPERTIES POSITION_INDEPENDENT_CODE ON)

set(emulated_kernels ${CSAT_KERNEL_SOURCES} ${emulator_dir}/gemm.cu)
list(REMOVE_ITEM emulated_kernels ${CSAT_CUBLAS_SOURCES})
set_source_files_properties(${emulated_kernels} PROPERTIES LANGUAGE CXX)
add_library(emulated_kernels OBJECT ${emulated_kernels})
target_link_libraries(emulated_kernels PRIVATE emulated_code)
set_target_properties(emulated_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)

add_library(csat_emulated SHARED ${emulator_dir}/backend.cpp $<TARGET_OBJECTS:emulated_kernels>)
target_include_directories(csat_emulated PRIVATE ${CSAT_SOURCE_ROOT})
target_link_libraries(csat_emulated PRIVATE emulator_runtime)

file(GLOB selftest_cases CONFIGURE_DEPENDS ${emulator_dir}/selftest/*_cases.cpp)
add_library(selftest_cases OBJECT ${selftest_cases})
target_link_libraries(selftest_cases PRIVATE emulated_code)
add_executable(emulator_selftest ${emulator_dir}/selftest/main.cpp $<TARGET_OBJECTS:selftest_cases>)
target_link_libraries(emulator_selftest PRIVATE emulator_runtime)
add_test(NAME emulator_selftest COMMAND emulator_selftest)
