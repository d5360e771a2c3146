"""What tests share: cases, the oracle, the error budget, and ways to call backends."""
