package access

import (
	"errors"
	"fmt"

	"signalbox/nft"
	"signalbox/proxier"
)

// Commit sends what has gathered in a table. Where the kernel may not hold what it
// held before, the error wraps proxier.ErrUnknownState too.
func Commit(t *nft.Table) error {
	err := t.Commit()
	if errors.Is(err, nft.ErrUnknownState) || errors.Is(err, nft.ErrTableChanged) {
		return fmt.Errorf("%w: %w", proxier.ErrUnknownState, err)
	}
	return err
}
