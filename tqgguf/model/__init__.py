"""llama.cpp models whose cache is compressed."""
