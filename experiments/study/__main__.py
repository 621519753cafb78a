import sys

from experiments.study.study import main

sys.exit(main())
