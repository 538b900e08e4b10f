"""What runs inside the sandbox: sent there as text, with the standard library alone at hand."""
