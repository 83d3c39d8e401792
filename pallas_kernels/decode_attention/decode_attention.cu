// Attention of a decode step as one call of XLA's: kernel.h.
#include "kernel.h"

#include "call.h"
