// Error macros: every message names the op, the argument, what was wanted and what came.
#pragma once

#include <torch/headeronly/util/Exception.h>

#define SFPK_CHECK(condition, op, argument, wanted, ...) \
  STD_TORCH_CHECK(condition, op, ": ", argument, ": wanted ", wanted, ", got ", __VA_ARGS__)
