"""diffusers' modules, evaluated faster.

diffusers defines, loads and owns the weights; the classes here walk over its modules and evaluate
them with the fused kernels, in channels_last, with related projections in one matrix product. Same
formula, same parameters: an adapter that is merged into a module's weight acts here at once.
"""
