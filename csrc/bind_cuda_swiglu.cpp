// The bindings of swiglu_cuda.h. Conventions are in bind_cuda.cpp.
#include "bind_cuda.h"
#include "swiglu/swiglu_cuda.h"

namespace pyllm {

void bind_swiglu(pybind11::module_& m) {
  // swiglu_fwd(gate, up, y, rows, cols, gate_stride, up_stride, dtype, stream)
  //   y = gate / (1 + exp(-gate)) * up; all (rows, cols) of one dtype, y contiguous
  m.def("swiglu_fwd", [](Address gate, Address up, Address y, int64_t rows, int64_t cols, int64_t gate_stride,
                         int64_t up_stride, int dtype, Address stream) {
    const Checked check{"swiglu_fwd"};
    check.size("rows", rows);
    check.size("cols", cols, kMostColumns);
    check.size("gate_stride", gate_stride);
    check.size("up_stride", up_stride);
    const bool empty = rows == 0 || cols == 0;
    SwigluForward args;
    args.gate = check.pointer("gate", gate, empty);
    args.up = check.pointer("up", up, empty);
    args.y = check.pointer("y", y, empty);
    args.rows = rows;
    args.cols = cols;
    args.gate_stride = gate_stride;
    args.up_stride = up_stride;
    args.dtype = check.dtype("dtype", dtype);
    check.succeeded(swiglu_fwd(args, reinterpret_cast<void*>(stream)));
  });
  // swiglu_bwd(dy, gate, up, dgate, dup, rows, cols, five strides in that order, dtype, stream)
  m.def("swiglu_bwd", [](Address dy, Address gate, Address up, Address dgate, Address dup, int64_t rows, int64_t cols,
                         int64_t dy_stride, int64_t gate_stride, int64_t up_stride, int64_t dgate_stride,
                         int64_t dup_stride, int dtype, Address stream) {
    const Checked check{"swiglu_bwd"};
    check.size("rows", rows);
    check.size("cols", cols, kMostColumns);
    check.size("dy_stride", dy_stride);
    check.size("gate_stride", gate_stride);
    check.size("up_stride", up_stride);
    // Rows that lie on top of each other could be read, but not written.
    check.require(dgate_stride >= cols || rows <= 1, "dgate_stride must be at least cols = ", cols, ", got ", dgate_stride);
    check.require(dup_stride >= cols || rows <= 1, "dup_stride must be at least cols = ", cols, ", got ", dup_stride);
    const bool empty = rows == 0 || cols == 0;
    SwigluBackward args;
    args.dy = check.pointer("dy", dy, empty);
    args.gate = check.pointer("gate", gate, empty);
    args.up = check.pointer("up", up, empty);
    args.dgate = check.pointer("dgate", dgate, empty);
    args.dup = check.pointer("dup", dup, empty);
    args.rows = rows;
    args.cols = cols;
    args.dy_stride = dy_stride;
    args.gate_stride = gate_stride;
    args.up_stride = up_stride;
    args.dgate_stride = dgate_stride;
    args.dup_stride = dup_stride;
    args.dtype = check.dtype("dtype", dtype);
    check.succeeded(swiglu_bwd(args, reinterpret_cast<void*>(stream)));
  });
}

}  // namespace pyllm
