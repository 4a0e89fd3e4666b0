"""Model cards of exports, and their upload to the Hugging Face Hub."""
