"""The network as one C++ call per step, for CPUs: `decoder.cpp`, compiled by `build` and called by `decoder`."""
