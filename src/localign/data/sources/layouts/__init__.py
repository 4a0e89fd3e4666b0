"""What tar and parquet files hold, and how they are laid out."""
