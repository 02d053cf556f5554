def draw_clips(folder):
    raise NotImplementedError
