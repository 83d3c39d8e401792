// out[m][n] = silu(gate) * up, gate and up sums over k of x[m][k] * w[n][k] with rows n and N + n of w, for many rows of x: one
// launch of decode_chain/products.h with two warpgroups of 64 rows. A row's bits depend neither on its company nor on how the
// product is cut up.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../decode_chain/products.h"

#include "launch.h"
