package access

import (
	"errors"
	"fmt"

	"signalbox/nft"
	"signalbox/proxier"
)

// Commit sends the changes of a table. If the kernel may not have what it had before,
// the error wraps proxier.ErrUnknownState too.
func Commit(t *nft.Table) error {
	err := t.Commit()
	if errors.Is(err, nft.ErrUnknownState) || errors.Is(err, nft.ErrTableChanged) {
		return fmt.Errorf("%w: %w", proxier.ErrUnknownState, err)
	}
	return err
}
