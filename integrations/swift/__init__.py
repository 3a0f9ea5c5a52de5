"""ms-swift: `tuner_type: qst` and `callbacks: [eu_pruning]`, in a file that ms-swift imports by its path."""
