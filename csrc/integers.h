// Integer arithmetic that host and device share.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sfpk {

// ⌈a / b⌉ for a ≥ 0, b > 0.
SFPK_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sfpk
