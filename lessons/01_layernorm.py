# %% [markdown]
# # Layer normalisation, by hand
#
# (A stub: the ladders, the check, the counts and an exercise.)

# %%
from llm_numba.lessons import exercise, ladder, pictures, timing
from rungs import layernorm_cpu, layernorm_cuda

# %%
pictures.source(layernorm_cpu.layernorm_forward_v1)

# %%
ladder.check(layernorm_cpu.FORWARD)
found = timing.show_times(layernorm_cpu.FORWARD)
pictures.show(pictures.draw_times(found))

# %%
ladder.check(layernorm_cuda.FORWARD)
pictures.show(pictures.draw_counts(ladder.counts(layernorm_cuda.FORWARD)))
pictures.show(pictures.draw_warp(ladder.trace_of(layernorm_cuda.layernorm_forward_v1, layernorm_cuda.FORWARD), "inp"))

# %%
exercise.show("layernorm_mean")

# %%
exercise.check("layernorm_mean")
