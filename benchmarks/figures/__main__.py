"""`python -m benchmarks.figures`: writes all plots and puts all tables into the README."""

from benchmarks.figures import authentication, corruption, extraction, pod, protection

if __name__ == "__main__":
    for part in (extraction, authentication, protection, corruption, pod):
        part.main()
