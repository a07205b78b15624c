"""Which configuration runs: knows ragged work and grids, not experts."""
