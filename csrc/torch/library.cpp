// The csat operators: schemas, CPU kernels, and the Python module `csat_ext._C` over them.
//
// Only LibTorch's stable ABI is used. pybind11 never sees a tensor type: tensors pass through as Python objects to
// torch.ops.csat.*, which is what keeps one binary valid for every torch release.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "csat_build_facts.h"  // written by setup.py: CSAT_VERSION and CSAT_REVISION, "" outside a checkout
#include "torch/cpu/gemm.h"
#include "torch/cpu/kernels.h"
#include "torch/explain.h"

namespace {

namespace cpu = csat::cpu;
namespace py = pybind11;

STABLE_TORCH_LIBRARY(csat, library) {
  library.def("project(Tensor x, Tensor phi, Tensor? key_mask) -> Tensor");
  library.def(
      "project_backward(Tensor dy, Tensor x, Tensor phi, Tensor? key_mask, bool need_dx, bool need_dphi) -> "
      "(Tensor, Tensor)");
  library.def("renormalise_rows(Tensor phi, Tensor key_mask) -> (Tensor, Tensor)");
  library.def(
      "project_implicit(Tensor x, Tensor? counts, Tensor? anchors, str ensemble, int rows, int heads, int seed, "
      "int layer) -> Tensor");
  library.def(
      "project_implicit_backward(Tensor dy, Tensor? counts, Tensor? anchors, str ensemble, int heads, int seed, "
      "int layer, int x_heads, SymInt tokens) -> Tensor");
  library.def("attend(Tensor q, Tensor kc, Tensor vc, Tensor? score_bias, float scale) -> (Tensor, Tensor)");
  library.def(
      "attend_backward(Tensor dz, Tensor q, Tensor kc, Tensor vc, Tensor? score_bias, Tensor z, Tensor lse, "
      "float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attend_causal(Tensor q, Tensor kc, Tensor vc, Tensor k, Tensor v, Tensor? score_bias, Tensor? key_mask, "
      "float scale, int block_size, int window_blocks, SymInt measurements_per_block) -> (Tensor, Tensor)");
  library.def(
      "attend_causal_backward(Tensor dz, Tensor q, Tensor kc, Tensor vc, Tensor k, Tensor v, Tensor? score_bias, "
      "Tensor? key_mask, Tensor z, Tensor lse, float scale, int block_size, int window_blocks, "
      "SymInt measurements_per_block) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attend_prefix(Tensor q, Tensor k, Tensor v, Tensor phi, Tensor kc, Tensor vc, Tensor mass, Tensor? score_bias, "
      "Tensor? key_mask, float scale, bool signed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attend_prefix_backward(Tensor dz, Tensor dkc_end, Tensor dvc_end, Tensor dmass_end, Tensor q, Tensor k, "
      "Tensor v, Tensor phi, Tensor kc, Tensor vc, Tensor mass, Tensor? score_bias, Tensor? key_mask, Tensor lse, "
      "float scale, bool signed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("decode(Tensor z, Tensor S, Tensor B, Tensor theta, Tensor? psi, Tensor step) -> Tensor");
  library.def(
      "decode_backward(Tensor dc, Tensor z, Tensor S, Tensor B, Tensor theta, Tensor? psi, Tensor step) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attend_decode(Tensor q, Tensor kc, Tensor vc, Tensor? score_bias, float scale, Tensor S, Tensor B, "
      "Tensor theta, Tensor? psi, Tensor step, bool need_z) -> (Tensor, Tensor, Tensor)");
  library.def(
      "attend_causal_decode(Tensor q, Tensor kc, Tensor vc, Tensor k, Tensor v, Tensor? score_bias, Tensor? key_mask, "
      "float scale, int block_size, int window_blocks, SymInt measurements_per_block, Tensor S, Tensor B, "
      "Tensor theta, Tensor? psi, Tensor step, bool need_z) -> (Tensor, Tensor, Tensor)");
  library.def(
      "attend_prefix_decode(Tensor q, Tensor k, Tensor v, Tensor phi, Tensor kc, Tensor vc, Tensor mass, "
      "Tensor? score_bias, Tensor? key_mask, float scale, bool signed, Tensor S, Tensor B, Tensor theta, Tensor? psi, "
      "Tensor step, bool need_z) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(csat, CPU, library) {
  library.impl("project", TORCH_BOX(&cpu::project));
  library.impl("project_backward", TORCH_BOX(&cpu::project_backward));
  library.impl("renormalise_rows", TORCH_BOX(&cpu::renormalise_rows));
  library.impl("project_implicit", TORCH_BOX(&cpu::project_implicit));
  library.impl("project_implicit_backward", TORCH_BOX(&cpu::project_implicit_backward));
  library.impl("attend", TORCH_BOX(&cpu::attend));
  library.impl("attend_backward", TORCH_BOX(&cpu::attend_backward));
  library.impl("attend_causal", TORCH_BOX(&cpu::attend_causal));
  library.impl("attend_causal_backward", TORCH_BOX(&cpu::attend_causal_backward));
  library.impl("attend_prefix", TORCH_BOX(&cpu::attend_prefix));
  library.impl("attend_prefix_backward", TORCH_BOX(&cpu::attend_prefix_backward));
  library.impl("decode", TORCH_BOX(&cpu::decode));
  library.impl("decode_backward", TORCH_BOX(&cpu::decode_backward));
  library.impl("attend_decode", TORCH_BOX(&cpu::attend_decode));
  library.impl("attend_causal_decode", TORCH_BOX(&cpu::attend_causal_decode));
  library.impl("attend_prefix_decode", TORCH_BOX(&cpu::attend_prefix_decode));
}

py::object op(const char* name) {
  return py::module_::import("torch").attr("ops").attr("csat").attr(name).attr("default");
}

// Exposes torch.ops.csat.<name> with its own keywords.
void expose(py::module_& m, const char* name) {
  m.def(name, [name](const py::args& args, const py::kwargs& kwargs) { return op(name)(*args, **kwargs); });
}

py::dict build_info() {
  py::dict info;
  info["version"] = CSAT_VERSION;
  info["revision"] = CSAT_REVISION;
  info["torch"] =
      C10_STRINGIZE(TORCH_VERSION_MAJOR) "." C10_STRINGIZE(TORCH_VERSION_MINOR) "." C10_STRINGIZE(TORCH_VERSION_PATCH);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["dtypes"] = py::make_tuple("float32", "float64", "bfloat16", "float16");
  info["instruction_set"] = cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CSAT operators on the CPU; every function is torch.ops.csat.* of the same name.";
  for (const char* name :
       {"project", "project_backward", "renormalise_rows", "project_implicit", "project_implicit_backward", "attend",
        "attend_backward", "attend_causal", "attend_causal_backward", "attend_prefix", "attend_prefix_backward",
        "decode", "decode_backward", "attend_decode", "attend_causal_decode", "attend_prefix_decode"})
    expose(m, name);
  m.def(
      "can_run", &csat::can_run, py::arg("kernel"), py::arg("family"), py::arg("sizes"), py::arg("dtype"),
      py::arg("weights"), py::arg("capability"), py::arg("shared_bytes"), py::arg("wgmma_code") = true,
      "Why a CUDA kernel does not take a problem in a family, or None if it does, and the bytes of shared memory of a "
      "block (csrc/csat/limits.h).");
  m.def("build_info", &build_info, "What this library was built from and for.");
}
