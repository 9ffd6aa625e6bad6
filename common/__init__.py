"""What only `main()` needs: datasets, evaluation, the run's folder. No algorithm."""
