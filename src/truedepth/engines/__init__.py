"""Files and plugins for other engines.

GGUF files for llama.cpp, the plugin for vLLM, and which engine runs which model.

May import: depth_study and above.
"""
