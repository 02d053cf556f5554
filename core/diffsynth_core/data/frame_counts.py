class FrameCounts:
    def __init__(self, memory):
        pass
