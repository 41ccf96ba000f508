"""Independent float64 NumPy references that the library's results are checked against.

Every function is a direct transcription of a published algorithm for ONE array (a
vector, a matrix, a block). It shares no code with the library, knows neither JAX nor
pytrees, and favours the words of the paper over speed::

    name(params, grads, *, learning_rate, ...) -> [params after step 1, step 2, ...]

``grads`` yields one gradient per step, ``learning_rate`` is a number or a function of
the 0-based step. ``conventions`` defines both, ``weight_decay`` the step that most of
them share, ``by_name`` lists them. ``golden`` holds numbers that other implementations
produced, ``torch_trajectories`` reads the recorded runs of PyTorch and of the authors'
packages; the tests here check the references against these and against optax.
"""
