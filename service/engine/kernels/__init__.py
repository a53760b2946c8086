"""The network as one C++ call per step, for CPUs: `decoder.h` and what it includes, compiled by `build` and called by `decoder`."""
