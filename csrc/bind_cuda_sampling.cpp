// The binding of sampling_cuda.h. Conventions are in bind_cuda.cpp.
#include "bind_cuda.h"
#include "sampling/sampling_cuda.h"

namespace py = pybind11;

namespace pyllm {

void bind_sampling(py::module_& m) {
  m.def(
      "sample",
      [](Address logits, Address uniform, Address tokens, int64_t rows, int64_t vocab, int64_t stride, double temperature,
         int64_t top_k, double top_p, double min_p, int dtype, Address stream) {
        const Checked check{"sample"};
        check.size("rows", rows, INT32_MAX);
        check.size("vocab", vocab, kMostSampled);
        check.require(vocab > 0, "vocab must be at least 1");
        check.require(temperature > 0, "temperature must be above 0, got ", temperature);
        check.require(top_k >= 1 && top_k <= vocab, "top_k must be between 1 and vocab, got ", top_k);
        check.require(top_p >= 0 && top_p <= 1, "top_p must be between 0 and 1, got ", top_p);
        check.require(min_p >= 0 && min_p <= 1, "min_p must be between 0 and 1, got ", min_p);
        Sampling a = {};
        a.logits = check.pointer("logits", logits, rows == 0);
        a.uniform = check.pointer<double>("uniform", uniform, rows == 0);
        a.tokens = check.pointer<int64_t>("tokens", tokens, rows == 0);
        a.rows = rows;
        a.vocab = vocab;
        a.stride = stride;
        a.temperature = float(temperature);
        a.top_k = top_k;
        a.top_p = top_p;
        a.min_p = float(min_p);
        a.dtype = check.dtype("dtype", dtype);
        check.succeeded(sample(a, reinterpret_cast<void*>(stream)));
      },
      py::arg("logits"), py::arg("uniform"), py::arg("tokens"), py::arg("rows"), py::arg("vocab"), py::arg("stride"),
      py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("dtype"), py::arg("stream"),
      "tokens[r] drawn from logits[r] by the number uniform[r]");
}

}  // namespace pyllm
