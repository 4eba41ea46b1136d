"""Independent references: papers' pseudocode written out naively, sharing no code with the solvers."""
