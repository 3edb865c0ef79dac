"""The mesh of processes, Ulysses sequence parallelism, and the contract between losses and gradients."""
