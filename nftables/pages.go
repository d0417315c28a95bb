package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"

	nflib "github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// dialForReading opens a connection for long listings. The kernel walks a map
// from its begin for every page of a listing, and makes pages as large as the
// largest buffer that it was ever asked to fill, up to 32 KiB. The library asks
// with 4 KiB; to list 100,000 elements takes six times as long with these.
func dialForReading() (*nflib.Conn, error) {
	conn, err := dialLow(nflib.WithSockOptions(largePages))
	if err != nil {
		return nil, fmt.Errorf("open netlink to nf_tables for reading: %w", err)
	}
	return conn, nil
}

// largePages has one answer of the kernel's read into a large buffer.
func largePages(c *netlink.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(raw.Control(func(fd uintptr) { err = askGeneration(int(fd)) }), err)
}

// askGeneration asks for the number of transactions, whose answer is there
// before the question's system call returns.
func askGeneration(fd int) error {
	const size = unix.SizeofNlMsghdr + 4 // and struct nfgenmsg
	b := binary.NativeEndian.AppendUint32(nil, size)
	b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, make([]byte, size-len(b))...)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("sendto: %w", err)
	}
	if _, _, err := unix.Recvfrom(fd, make([]byte, 64<<10), unix.MSG_DONTWAIT); err != nil {
		return fmt.Errorf("recvfrom: %w", err)
	}
	return nil
}
