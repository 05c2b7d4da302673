// Marks helpers that host and device kernels share.
#pragma once

#if defined(__CUDACC__)
#define SFPK_HD __host__ __device__
#else
#define SFPK_HD
#endif
