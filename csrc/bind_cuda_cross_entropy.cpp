// The bindings of cross_entropy_cuda.h. Conventions are in bind_cuda.cpp.
#include "bind_cuda.h"
#include "cross_entropy/cross_entropy_cuda.h"

namespace pyllm {
namespace {

// What forward and backward have in common.
void fill(CrossEntropy& args, const Checked& check, Address logits, Address target, Address weight, Address weight_sum,
          int64_t rows, int64_t classes, int64_t stride, int64_t ignore_index, float smoothing, float z_loss,
          float softcap, int dtype) {
  check.size("rows", rows);
  check.size("classes", classes, kMostColumns);
  check.size("stride", stride);
  check.require(smoothing >= 0 && smoothing <= 1, "smoothing must be between 0 and 1, got ", smoothing);
  check.require(softcap >= 0, "softcap must not be negative, got ", softcap);
  args.logits = check.pointer("logits", logits, rows == 0 || classes == 0);
  args.target = check.pointer<int64_t>("target", target, rows == 0);
  args.weight = check.pointer<float>("weight", weight, true);
  args.weight_sum = check.pointer<float>("weight_sum", weight_sum, weight == 0 || smoothing == 0);
  args.rows = rows;
  args.classes = classes;
  args.stride = stride;
  args.ignore_index = ignore_index;
  args.smoothing = smoothing;
  args.z_loss = z_loss;
  args.softcap = softcap;
  args.dtype = check.dtype("dtype", dtype);
}

}  // namespace

void bind_cross_entropy(pybind11::module_& m) {
  // cross_entropy_fwd(logits, target, weight_or_0, weight_sum_or_0, loss, lse, part_or_0, parts, rows, classes, stride,
  //                   ignore_index, smoothing, z_loss, softcap, dtype, stream)
  //   logits (rows, classes); target (rows) int64; weight (classes) float32, weight_sum their sum, where smoothing needs
  //   it; loss, lse (rows) float32; part (rows, parts, 4) float32 where parts > 1. The same bits for the same `parts`.
  m.def("cross_entropy_fwd", [](Address logits, Address target, Address weight, Address weight_sum, Address loss,
                                Address lse, Address part, int64_t parts, int64_t rows, int64_t classes, int64_t stride,
                                int64_t ignore_index, float smoothing, float z_loss, float softcap, int dtype,
                                Address stream) {
    const Checked check{"cross_entropy_fwd"};
    CrossEntropyForward args;
    fill(args, check, logits, target, weight, weight_sum, rows, classes, stride, ignore_index, smoothing, z_loss,
         softcap, dtype);
    check.require(parts >= 1 && parts <= INT32_MAX, "parts must be between 1 and ", INT32_MAX, ", got ", parts);
    args.loss = check.pointer<float>("loss", loss, rows == 0);
    args.lse = check.pointer<float>("lse", lse, rows == 0);
    args.part = check.pointer<float>("part", part, rows == 0 || parts == 1);
    args.parts = parts;
    check.succeeded(cross_entropy_fwd(args, reinterpret_cast<void*>(stream)));
  });
  // cross_entropy_bwd(dloss, logits, lse, target, weight_or_0, weight_sum_or_0, dlogits, rows, classes, columns, first,
  //                   stride, dloss_stride, ignore_index, smoothing, z_loss, softcap, dtype, dlogits_dtype, stream)
  //   logits, dlogits (rows, columns): of the classes `first` and on; dlogits in the logits' dtype, in any where that is
  //   float32.
  m.def("cross_entropy_bwd", [](Address dloss, Address logits, Address lse, Address target, Address weight,
                                Address weight_sum, Address dlogits, int64_t rows, int64_t classes, int64_t columns,
                                int64_t first, int64_t stride, int64_t dloss_stride, int64_t ignore_index,
                                float smoothing, float z_loss, float softcap, int dtype, int dlogits_dtype,
                                Address stream) {
    const Checked check{"cross_entropy_bwd"};
    CrossEntropyBackward args;
    fill(args, check, logits, target, weight, weight_sum, rows, classes, stride, ignore_index, smoothing, z_loss,
         softcap, dtype);
    check.size("first", first, classes);
    check.size("columns", columns, classes - first);
    check.size("dloss_stride", dloss_stride);
    args.dlogits_dtype = check.dtype("dlogits_dtype", dlogits_dtype);
    check.require(args.dtype == DType::kFloat32 || dtype == dlogits_dtype, "dlogits_dtype must be the logits' (", dtype,
                  "), got ", dlogits_dtype);
    args.dloss = check.pointer<float>("dloss", dloss, rows == 0);
    args.lse = check.pointer<float>("lse", lse, rows == 0);
    args.dlogits = check.pointer("dlogits", dlogits, rows == 0 || columns == 0);
    args.dloss_stride = dloss_stride;
    args.columns = columns;
    args.first = first;
    check.succeeded(cross_entropy_bwd(args, reinterpret_cast<void*>(stream)));
  });
  // cross_entropy_fwd_parts(rows, classes, sm_count) -> parts, at least 1
  m.def("cross_entropy_fwd_parts", [](int64_t rows, int64_t classes, int64_t sm_count) {
    const Checked check{"cross_entropy_fwd_parts"};
    check.size("rows", rows);
    check.size("classes", classes, kMostColumns);
    return cross_entropy_fwd_parts(rows, classes, sm_count);
  });
}

}  // namespace pyllm
