"""What every operator shares: argument checks, backend choice, operator registration, numerics, device questions."""
