# ggml is built without the rest of llama.cpp; alone, it asks for a template that the archive of llama-cpp-python lacks.
file(TOUCH ${CMAKE_CURRENT_SOURCE_DIR}/ggml.pc.in)
