#include "runtime/static_shared.h"

#include <link.h>

#include <vector>

#include "runtime/shadow.h"

namespace emulator {

namespace {

thread_local volatile char anchor = 1;  // makes sure that the object has a thread-local block, and that it is allocated
std::vector<Cell> cells;

int visit(dl_phdr_info* object, size_t, void*) {
  bool mine = false;
  size_t tls_bytes = 0;
  const auto self = reinterpret_cast<uintptr_t>(&find_static_shared_memory);
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const auto& segment = object->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD && self - (object->dlpi_addr + segment.p_vaddr) < segment.p_memsz) mine = true;
    if (segment.p_type == PT_TLS) tls_bytes = segment.p_memsz;
  }
  if (!mine) return 0;
  memory_map.static_shared = static_cast<unsigned char*>(object->dlpi_tls_data);
  memory_map.static_shared_bytes = object->dlpi_tls_data ? tls_bytes : 0;
  return 1;
}

}  // namespace

void find_static_shared_memory() {
  anchor = 1;
  dl_iterate_phdr(visit, nullptr);
  cells.resize(memory_map.static_shared_bytes / kGranule + 2);
  memory_map.static_shared_cells = cells.data();
}

size_t static_shared_bytes_touched() {
  size_t granules = 0;
  for (const Cell& cell : cells) {
    granules += clock_of(cell.write) >= observer.launch_start || clock_of(cell.read[0]) >= observer.launch_start;
  }
  return granules * kGranule;
}

}  // namespace emulator
