package node

import (
	"fmt"
	"strconv"
)

// SetOOMScore tells the kernel how readily it may kill this process when memory
// runs out, from -1000 (never) to 1000.
func SetOOMScore(score int32) error {
	if err := writeSetting("/proc/self/oom_score_adj", strconv.Itoa(int(score))); err != nil {
		return fmt.Errorf("--oom-score-adj=%d: %w", score, err)
	}
	return nil
}
