// Everything between two attentions of a decode step, as one call of XLA's: chain.h.
#include "chain.h"

#include "launch.h"
