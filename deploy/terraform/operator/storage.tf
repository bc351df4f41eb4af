# The bucket holds what the instances are made from (artefacts/), what they leave behind (backup/) and, where several share their
# state, tables and bundles (blobs/). All of it is public or sealed; the bucket is closed all the same.

data "aws_caller_identity" "this" {}

data "aws_partition" "this" {}

locals {
  account_root = "arn:${data.aws_partition.this.partition}:iam::${data.aws_caller_identity.this.account_id}:root"
}

resource "aws_kms_key" "bucket" {
  description             = "Parley: the operator's bucket"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  policy                  = data.aws_iam_policy_document.bucket_key.json
}

data "aws_iam_policy_document" "bucket_key" {
  statement {
    sid = "AccountManages"
    actions = [
      "kms:CancelKeyDeletion",
      "kms:DescribeKey",
      "kms:DisableKey",
      "kms:EnableKey",
      "kms:EnableKeyRotation",
      "kms:GetKeyPolicy",
      "kms:GetKeyRotationStatus",
      "kms:ListResourceTags",
      "kms:PutKeyPolicy",
      "kms:ScheduleKeyDeletion",
      "kms:TagResource",
      "kms:UntagResource",
      "kms:UpdateKeyDescription",
    ]
    resources = ["*"]

    principals {
      type        = "AWS"
      identifiers = [local.account_root]
    }
  }

  # S3 asks on behalf of whoever reads or writes an object and may do so by its own policy.
  statement {
    sid       = "ThroughS3"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = ["*"]

    principals {
      type        = "AWS"
      identifiers = [local.account_root]
    }

    condition {
      test     = "StringEquals"
      variable = "kms:ViaService"
      values   = ["s3.${var.region}.amazonaws.com"]
    }
  }
}

resource "aws_s3_bucket" "this" {
  bucket_prefix = "${var.name}-"
  force_destroy = false
}

resource "aws_s3_bucket_public_access_block" "this" {
  bucket                  = aws_s3_bucket.this.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    bucket_key_enabled = true

    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = aws_kms_key.bucket.arn
    }
  }
}

# A deleted table is to be gone: no versions are kept. Copies of the database end by themselves; the ciphertext beside them is a
# mirror of what the coordinator has, and follows it. What is in blobs/ the coordinators delete, and nothing else may; a member's
# upload may pause there for weeks, so only what no coordinator has come back to for long is cut off.
resource "aws_s3_bucket_lifecycle_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    id     = "abandoned-artefacts"
    status = "Enabled"

    filter {
      prefix = "artefacts/"
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }

  rule {
    id     = "abandoned-backups"
    status = "Enabled"

    filter {
      prefix = "backup/"
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }

  rule {
    id     = "abandoned-tables"
    status = "Enabled"

    filter {
      prefix = "blobs/"
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 90
    }
  }

  rule {
    id     = "databases"
    status = "Enabled"

    filter {
      prefix = "backup/database/"
    }

    expiration {
      days = var.backup_days
    }
  }
}

data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "OnlyTls"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }

  statement {
    sid       = "OnlyThisAccount"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "StringNotEquals"
      variable = "aws:PrincipalAccount"
      values   = [data.aws_caller_identity.this.account_id]
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  bucket = aws_s3_bucket.this.id
  policy = data.aws_iam_policy_document.bucket.json

  depends_on = [aws_s3_bucket_public_access_block.this]
}

# Named by their digest: an object that stands under a name never changes.
resource "aws_s3_object" "image" {
  bucket = aws_s3_bucket.this.id
  key    = "artefacts/${var.image.sha384}.eif"
  source = var.image.path

  depends_on = [aws_s3_bucket_server_side_encryption_configuration.this, aws_s3_bucket_policy.this]
}

resource "aws_s3_object" "bundle" {
  bucket = aws_s3_bucket.this.id
  key    = "artefacts/${var.bundle.sha384}.tar"
  source = var.bundle.path

  depends_on = [aws_s3_bucket_server_side_encryption_configuration.this, aws_s3_bucket_policy.this]
}

resource "aws_ebs_volume" "data" {
  for_each = var.parents

  availability_zone = each.value
  size              = var.data_gib
  type              = "gp3"
  encrypted         = true

  tags = { Name = "${var.name}-${each.key}-data" }

  lifecycle {
    prevent_destroy = true
  }
}
