"""`python -m benchmarks.figures`: writes all plots and puts all tables into the README."""

from benchmarks.figures import authentication, extraction, pod, protection

if __name__ == "__main__":
    extraction.main()
    authentication.main()
    protection.main()
    pod.main()
