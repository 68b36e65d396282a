"""The paper's claims at the embedded scale, a folder each."""
