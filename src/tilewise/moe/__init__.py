"""The MoE layer, file by file in the order in which data flows through it."""
