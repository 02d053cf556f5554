VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
VIDEO_TRANSFORM = 1


def read_video_header(path):
    raise NotImplementedError


def load_clip(*a):
    raise NotImplementedError
