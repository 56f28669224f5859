"""The processes: how they meet, and what each of them has.

- `process_group`: how they find each other, and part again;
- `torch_mesh`, `cuts`: the mesh, and the order in which its axes cut a dim;
- `context`: what the current distribution means for this process;
- `rows`: which rows of a batch are local, and what they weigh;
- `agreement`, `configuration`: what must be equal, and whether it is;
- `together`: work that may fail on one of them;
- `watch`: who waits for whom;
- `gloo_on_gpus`: what gloo lacks there.
"""
