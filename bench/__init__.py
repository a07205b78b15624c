"""The benchmark of the MoE layer: peers side by side in one run, paired and interleaved."""
