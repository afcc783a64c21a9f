"""The methods as plain numpy recursions: what the library is tested against."""
