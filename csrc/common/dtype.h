// dtype codes that cross the border to Python (kernels/extension.py). float64 exists on the CPU only.
#pragma once

namespace pyllm {
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
}
